"""The HTML report page of a run, and the page that compares runs."""
