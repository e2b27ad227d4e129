"""What goes where: a model's parts, the cut into stages, one stage, loading. No process groups."""
