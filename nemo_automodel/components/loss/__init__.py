"""Losses: each returns the SUM over label tokens; the recipe divides once by the global count."""
