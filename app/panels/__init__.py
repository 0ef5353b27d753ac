"""Figures for the page, drawn as HTML and SVG from plain data."""
