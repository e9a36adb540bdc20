"""Engines that sample; each heavy third party enters through one file."""
