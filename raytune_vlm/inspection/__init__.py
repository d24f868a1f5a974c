"""What is in a folder of image-text data, and its samples as the model will see them.

Pure functions give typed values (`detect`, `rows`, `sample_view`, `lengths`, `tally`); `terminal`
and `page` render them. No Ray: one process, one row at a time.
"""
