"""What the scripts run: each job joins evaluation, metrics, figures and files for one command.

A job takes plain arguments, writes into a run folder and returns its summary; flags stay in
`scripts/`, and whatever is worth importing lives in the rooms that the jobs join.
"""
