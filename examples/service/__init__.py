"""A mesh service as a team would start one: an HTTP interface, a leader that computes routes, a page that shows it."""
