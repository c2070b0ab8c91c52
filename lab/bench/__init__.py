"""Benchmarks: ratios of arms that take turns (`runner`), and those that the paper's claims need (`cases`)."""
