"""Faces of other engines over ours, for scripts written for them."""
