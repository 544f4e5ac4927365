"""One layer before and after, drawn: SVG, a page of HTML, Graphviz text."""
