"""Write a page of figures about runs, from the files of the runs alone, and compare them in a table.

This room knows recipes, models, images, attention maps and Gram matrices; it knows nothing of training.
`run_files` and `comparison` need no matplotlib; `write` is the page.
"""
