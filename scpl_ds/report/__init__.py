"""``scpl-ds report``: one HTML page of a run, from what lies in its folder. Imports no torch."""
