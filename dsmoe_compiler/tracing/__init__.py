"""What lets a user's code be traced as it is written: Python over tensors' values, sizes, conversions."""
