"""Which method finds the passages that state a fact, and which finds those that move the model: side by side.

Read `facts` (what is asked and what counts as found), `method` (what is compared), `measures` and `intervals` (how it
is judged), `run` (the whole of it). Nothing else in the library needs this package.
"""
