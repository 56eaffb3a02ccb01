"""The papers' tables: their cells, the recipe of each, its runs, and the numbers side by side."""
