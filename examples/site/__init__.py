"""A small news site: pages through the cache, views and counts written behind, edits invalidated everywhere."""
