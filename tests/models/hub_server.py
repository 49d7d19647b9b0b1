# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face hub of this machine, as far as downloading a model asks for one."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(models, gated=()):
    """Serves models.

    Args:
      models: of each by name, the contents of files by name.
      gated: names of models that are refused.

    Yields:
      The server's address, and the list of the files that were sent.
    """
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = urllib.parse.urlsplit(self.path).path.strip("/")
            parts = path.removeprefix("api/models/").split("/")
            name = "/".join(parts[:2])
            if name in gated:
                self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            elif name not in models:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            elif path.startswith("api/") and parts[2] == "tree":
                self.reply_json([self.entry(*file) for file in models[name].items()], body)
            elif path.startswith("api/"):
                self.reply_json({"id": name, "sha": COMMIT, "siblings": []}, body)
            else:
                file = "/".join(parts[4:])
                content = models[name].get(file)
                if content is None:
                    self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                    return
                if body:
                    sent.append(file)
                etag = hashlib.sha1(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                self.reply(200, content, headers, body)

        def entry(self, file, content):
            oid = hashlib.sha1(content).hexdigest()
            return {"type": "file", "path": file, "size": len(content), "oid": oid}

        def reply_json(self, value, body):
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

        def reply(self, code, content, headers, body):
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
