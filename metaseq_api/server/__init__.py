"""The HTTP front end: one engine behind a few routes. No torch in here: it meets the engine as `EngineProtocol`.

fields  values of a body, read strictly
schema  JSON in and out
app     routes, and every error as JSON      (create_app)
run     waitress around it, from bind to drain (bind, Server)
"""
