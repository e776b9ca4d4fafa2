"""What stands between a request and the rows in it: access, bounds, bodies, columns, refusals."""
