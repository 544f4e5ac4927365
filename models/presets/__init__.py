"""The sizes of the models one can name, a file for each family."""
