"""Figures and tables made from logged data alone."""
