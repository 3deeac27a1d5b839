"""What `edgecomp report` makes of results: one value (`values.Page`), and its forms: text, Markdown, CSV, HTML, plots.

Nothing here measures, and nothing reads a clock: the same results give the same bytes.
"""
