"""Understanding a layer: what each row of each value means, and where rows become tokens again."""
