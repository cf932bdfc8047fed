"""The hub's HTTP interface, as far as `huggingface_hub` uses it to look up, download and upload model repositories.

Large files are uploaded by the LFS protocol, in parts where they are larger than `part_bytes`; they are downloaded by a
redirect to another path, with ranges. Requests can be made to fail: see `Standin.fault`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from tests.support.hub.repositories import File, Repository, is_large

TOKEN = "hf_stand_in"
HOSTS = ("127.0.0.1", "127.0.0.2")
"""Of the hub, and of the store that downloads of large files are redirected to: another machine, to a client."""
PAGE = 7
"""Entries of a page of a listing: few, so that there are several."""

Fault = Callable[[web.Request, int], str | None]
"""(request, its number) -> "drop" (the connection breaks half-way), "503", or None."""


class Standin:
    """A server of repositories; runs in a thread of its own."""

    def __init__(self, part_bytes: int = 200_000):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_bytes = part_bytes
        self.fault: Fault = lambda request, number: None
        self.requests: list[str] = []
        """Method and path of each."""
        self.sent = 0
        """Bytes of files that were downloaded."""
        self.url = self.cdn_url = ""

    # -- running --------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[Standin]:
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> web.AppRunner:
            runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            for host in HOSTS:
                await web.TCPSite(runner, host, 0).start()
            self.url, self.cdn_url = (f"http://{host}:{port}" for host, port in runner.addresses)
            return runner

        def run() -> None:
            asyncio.set_event_loop(loop)
            runner = loop.run_until_complete(start())
            loop.call_soon(ready.set)  # once it runs: a stop before would be lost
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            assert not thread.is_alive()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**31, middlewares=[self._around])
        model = "/api/models/{user}/{name}"
        app.add_routes(
            [
                web.get("/api/whoami-v2", self.whoami),
                web.post("/api/validate-yaml", self.validate_yaml),
                web.post("/api/repos/create", self.create),
                web.get(model, self.info),
                web.get(model + "/revision/{revision:.+}", self.info),
                web.post(model + "/branch/{branch:.+}", self.branch),
                web.get(model + "/tree/{rest:.+}", self.tree),
                web.post(model + "/preupload/{revision:.+}", self.preupload),
                web.post(model + "/commit/{revision:.+}", self.commit),
                web.post("/{user}/{name}.git/info/lfs/objects/batch", self.batch),
                web.put("/lfs/{oid}", self.put_object),
                web.put("/lfs/{oid}/{part}", self.put_part),
                web.post("/lfs/{oid}/complete", self.complete),
                web.post("/lfs/{oid}/verify", self.verify),
                web.get("/cdn/{oid}", self.cdn),
                web.get("/{user}/{name}/resolve/{revision}/{path:.+}", self.resolve),
            ]
        )
        return app

    @web.middleware
    async def _around(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        fault = self.fault(request, len(self.requests))
        if fault == "503":
            return web.Response(status=503, text="overloaded")
        if fault == "drop":
            if request.method in ("PUT", "POST"):
                await request.content.readany()  # something arrives
            elif request.path.startswith("/cdn/"):
                return await self.cdn(request, half=True)
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        return await handler(request)

    # -- who, and what there is -----------------------------------------------------------------------------------

    def _has_token(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _writer(self, request: web.Request) -> None:
        if not self._has_token(request):
            raise web.HTTPUnauthorized(headers={"X-Error-Message": "Invalid username or password."})

    def _repository(self, request: web.Request) -> Repository:
        """As to the hub, a private one is none to others."""
        found = self.repositories.get(f"{request.match_info['user']}/{request.match_info['name']}")
        if found is None or (found.private and not self._has_token(request)):
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            raise (web.HTTPNotFound if self._has_token(request) else web.HTTPUnauthorized)(headers=missing)
        if found.gated:
            raise web.HTTPForbidden(headers={"X-Error-Code": "GatedRepo"})
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"})
        return commit

    async def whoami(self, request: web.Request) -> web.Response:
        self._writer(request)
        return web.json_response({"type": "user", "name": "user", "orgs": []})

    async def validate_yaml(self, request: web.Request) -> web.Response:
        content = (await request.json())["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        return web.json_response({"errors": errors, "warnings": []}, status=400 if errors else 200)

    async def create(self, request: web.Request) -> web.Response:
        self._writer(request)
        body = await request.json()
        name = f"{body.get('organization') or 'user'}/{body['name']}"
        url = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return web.json_response({**url, "error": "You already created this model repo"}, status=409)
        private = body.get("private", body.get("visibility") == "private")
        self.repositories[name] = Repository(private=bool(private))
        return web.json_response(url)

    async def branch(self, request: web.Request) -> web.Response:
        self._writer(request)
        repository, name = self._repository(request), request.match_info["branch"]
        if name in repository.branches:
            return web.json_response({"error": "Reference already exists"}, status=409)
        repository.branches[name] = repository.branches["main"]
        return web.json_response({"success": True})

    async def info(self, request: web.Request) -> web.Response:
        repository = self._repository(request)
        name = f"{request.match_info['user']}/{request.match_info['name']}"
        commit = self._commit(repository, request.match_info.get("revision", "main"))
        described = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repository.private}
        return web.json_response({**described, "tags": [], "downloads": 0, "likes": 0, "siblings": []})

    async def tree(self, request: web.Request) -> web.Response:
        repository = self._repository(request)
        revision, _, folder = request.match_info["rest"].partition("/")
        commit = self._commit(repository, revision)
        entries = [
            file.entry(path)
            for path, file in sorted(repository.commits[commit].items())
            if not folder or path.startswith(f"{folder}/")
        ]
        start = int(request.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            following = request.url.update_query(cursor=str(start + PAGE))
            headers["Link"] = f'<{following}>; rel="next"'
        return web.json_response(entries[start : start + PAGE], headers=headers)

    # -- uploading ------------------------------------------------------------------------------------------------

    async def preupload(self, request: web.Request) -> web.Response:
        self._writer(request)
        repository = self._repository(request)
        there = repository.commits[self._commit(repository, request.match_info["revision"])]
        answers = []
        for file in (await request.json())["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path, file["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in there:
                entry = there[path].entry(path)
                answer["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(answer)
        return web.json_response({"files": answers})

    async def batch(self, request: web.Request) -> web.Response:
        self._writer(request)
        self._repository(request)
        objects: list[dict[str, Any]] = []
        for one in (await request.json())["objects"]:
            oid, size = one["oid"], one["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}"}
                if size > self.part_bytes:
                    count = -(-size // self.part_bytes)
                    header = {f"{part:05}": f"{self.url}/lfs/{oid}/{part}" for part in range(1, count + 1)}
                    upload = {
                        "href": f"{self.url}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(self.part_bytes), **header},
                    }
                verify = {"href": f"{self.url}/lfs/{oid}/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return web.json_response({"transfer": "multipart", "objects": objects})

    async def put_object(self, request: web.Request) -> web.Response:
        content = await request.read()
        if hashlib.sha256(content).hexdigest() != request.match_info["oid"]:
            return web.Response(status=400, text="wrong checksum")
        self.objects[request.match_info["oid"]] = content
        return web.Response()

    async def put_part(self, request: web.Request) -> web.Response:
        content = await request.read()
        self.parts[request.match_info["oid"], int(request.match_info["part"])] = content
        return web.Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def complete(self, request: web.Request) -> web.Response:
        oid, body = request.match_info["oid"], await request.json()
        content = b"".join(self.parts.get((oid, part["partNumber"]), b"") for part in body["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            return web.Response(status=400, text="wrong checksum")
        self.objects[oid] = content
        return web.json_response({})

    async def verify(self, request: web.Request) -> web.Response:
        body = await request.json()
        right = len(self.objects.get(body["oid"], b"")) == body["size"]
        return web.Response(status=200 if right else 404)

    async def commit(self, request: web.Request) -> web.Response:
        self._writer(request)
        repository, branch = self._repository(request), request.match_info["revision"]
        files = dict(repository.commits[self._commit(repository, branch)])
        message = ""
        for line in (await request.read()).splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            path = value.get("path", "")
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    return web.json_response({"error": f"{path} was not uploaded"}, status=400)
                files[path] = File(self.objects[value["oid"]], True)
            elif kind == "deletedFile":
                del files[path]
            else:
                return web.json_response({"error": f"unknown {kind}"}, status=400)
        oid = repository.commit(branch, files, message)
        name = f"{request.match_info['user']}/{request.match_info['name']}"
        return web.json_response({"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid})

    # -- downloading ----------------------------------------------------------------------------------------------

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        repository, path = self._repository(request), request.match_info["path"]
        commit = self._commit(repository, request.match_info["revision"])
        headers = {"X-Repo-Commit": commit}
        file = repository.commits[commit].get(path)
        if file is None:
            raise web.HTTPNotFound(headers={**headers, "X-Error-Code": "EntryNotFound"})
        if file.large:
            self.objects.setdefault(file.digest, file.content)
            headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.digest}"'}
            headers["Location"] = f"{self.cdn_url}/cdn/{file.digest}"
            return web.Response(status=302, headers=headers)
        headers["ETag"] = f'"{file.entry(path)["oid"]}"'
        self.sent += len(file.content) if request.method == "GET" else 0
        return web.Response(body=file.content, headers=headers)

    async def cdn(self, request: web.Request, half: bool = False) -> web.StreamResponse:
        content = self.objects[request.match_info["oid"]]
        asked = request.http_range
        part = content[asked]
        headers = {"ETag": f'"{request.match_info["oid"]}"', "Content-Length": str(len(part)), "Accept-Ranges": "bytes"}
        status = 200
        if asked.start is not None:
            status = 206
            headers["Content-Range"] = f"bytes {asked.start}-{asked.start + len(part) - 1}/{len(content)}"
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        part = part[: len(part) // 2] if half else part
        for start in range(0, len(part), 2**16):
            await response.write(part[start : start + 2**16])
        self.sent += len(part)
        if half:
            assert request.transport is not None
            await asyncio.sleep(0.01)
            request.transport.abort()
        else:
            await response.write_eof()
        return response
