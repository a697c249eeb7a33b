"""The accuracy report as a document and as a page; it imports no torch, so that the service can render it, too."""

FORMAT = "aquant-report/2"
"""The report's ``format``; reports before 0.3 have none."""
