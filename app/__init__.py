"""The page and its background worker. Nothing here imports torch in the page process."""
