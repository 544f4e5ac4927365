"""The ground floor: specs, bodies, errors, reference maths, ops, printer. Imports only itself."""
