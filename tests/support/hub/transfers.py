"""Uploads to the stand-in and downloads from it.

Large files are uploaded by the LFS protocol, in parts where they are larger than `part_bytes`; they are downloaded by a
redirect to another path, with ranges.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Any

from aiohttp import web

from tests.support.hub.lookups import Lookups
from tests.support.hub.repositories import File, is_large


class Transfers(Lookups):
    """Contents of files, in and out."""

    def __init__(self, part_bytes: int) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_bytes = part_bytes
        self.sent = 0
        """Bytes of files that were downloaded."""
        self.cdn_url = ""

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
