"""What the stand-in answers about repositories: who may write, which there are, and their listings."""

from __future__ import annotations

from aiohttp import web

from tests.support.hub.repositories import Repository

TOKEN = "hf_stand_in"
PAGE = 7
"""Entries of a page of a listing: few, so that there are several."""


class Lookups:
    """Repositories by name: their making, branches and listings."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.url = ""

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
