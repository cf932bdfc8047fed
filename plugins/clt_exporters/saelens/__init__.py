"""Folders of SAELens, SAEDashboard and SAEBench."""
