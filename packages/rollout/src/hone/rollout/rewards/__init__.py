"""Judging responses: a reward function (`function`), what it may return (`result`), and the processes that run it (`pool`)."""
