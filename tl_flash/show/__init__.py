"""The show wing: results to look at, as plotly figures (`plots`) and as the explorer page (`report`).

Users import both by shorter names, `tl_flash.plots` and `tl_flash.report`.
"""
