"""The page that shows what was kept of a prompt: data.py gathers it, page.py writes it."""
