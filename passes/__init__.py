"""Graph to graph: the understanding and what follows from it. Nothing here knows how a layer is run."""
