"""`clp serve`: a run behind an HTTP server, for programs and for people.

decoder.py     rows of any requests, decoded together in compiled shapes
batcher.py     the queue before it, deadlines and the decoding thread
text.py        tokens to text, in pieces and up to stop strings
answer.py      answers in OpenAI's forms, with log-probabilities
schema.py      what a request and an answer look like: OpenAI's form
api.py         the routes
protection.py  what keeps strangers and floods out
server.py      all of it on a socket
page/          the page at /
"""
