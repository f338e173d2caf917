"""moto's S3 server, for one writing request at a time: by itself it looks whether an object is there, and makes it later, so
that of several requests with `If-None-Match: *` more than one may succeed, as in no real store."""

import threading

import moto.server

lock = threading.Lock()
run = moto.server.run_simple


def serial(host, port, app, **options):
    def one(environ, start_response):
        if environ["REQUEST_METHOD"] == "GET":
            return app(environ, start_response)
        with lock:
            return list(app(environ, start_response))

    run(host, port, one, **options)


moto.server.run_simple = serial
moto.server.main()
