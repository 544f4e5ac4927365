"""The zoo: Mixture-of-Experts models in plain torch, importing nothing else of the project."""
