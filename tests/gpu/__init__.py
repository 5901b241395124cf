"""Tests that need a GPU. A package: its files may have the names of the lessons' tests."""
