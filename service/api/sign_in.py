"""Signing in to the page with an API key, and out again.

The key is kept in a cookie that no script can read (HttpOnly), that no request from another site carries
(SameSite=Strict), that goes over TLS alone where the page did (Secure), and that ends with the browser's session.
Only the page's own routes look at it (``auth.VisitorDep``), so nothing that a program can do can be done with a cookie.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.security import HTTPAuthorizationCredentials

from service.api.auth import COOKIE, SECURE_COOKIE, admit_to_page, bearer_of
from service.api.deps import PartsDep
from service.api.forms import read_whole
from service.api.locality import check_own_page
from service.api.page_route import SIGN_IN, PageRoute, in_words
from service.jobs.errors import KeyInvalidError, KeyMissingError, ServiceError, UploadTooLargeError
from service.pages.render import render

router = APIRouter(include_in_schema=False, route_class=PageRoute)

MAX_FORM_BYTES = 4096

Next = Annotated[str, Query(max_length=1000)]


@router.get(SIGN_IN)
async def form(request: Request, parts: PartsDep, next: Next = "/") -> Response:
    """Ask for a key, and say what is the matter with the one there was; nobody is asked who needs none."""
    try:
        await run_in_threadpool(admit_to_page, request, parts, bearer_of(request))
    except KeyMissingError:
        return HTMLResponse(render("sign_in.html", problem=None, next=_own(next)))
    except ServiceError as error:
        return await in_words(request, error, "sign_in.html", next=_own(next))
    return RedirectResponse(_own(next), 303)


@router.post(SIGN_IN)
async def sign_in(request: Request, parts: PartsDep) -> Response:
    """Take a key, if it is a good one."""
    fields = await _fields(request)
    key, following = fields.get("key", "").strip(), _own(fields.get("next", "/"))
    try:
        credentials = HTTPAuthorizationCredentials(scheme="Form", credentials=key) if key else None
        owner = await run_in_threadpool(admit_to_page, request, parts, credentials)
    except (KeyInvalidError, KeyMissingError) as error:
        return await in_words(request, error, "sign_in.html", next=following)
    response = RedirectResponse(following, 303)
    if owner is not None:  # else there are no keys: nothing is worth keeping
        https = _is_https(request)
        name = SECURE_COOKIE if https else COOKIE
        response.set_cookie(name, key, path="/", secure=https, httponly=True, samesite="strict")
    return response


@router.post("/page/sign-out")
def sign_out(request: Request) -> Response:
    """Forget the key, also one that is good for nothing any more."""
    check_own_page(request)
    response = RedirectResponse("/", 303)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    response.delete_cookie(SECURE_COOKIE, path="/", secure=True, httponly=True, samesite="strict")
    return response


async def _fields(request: Request) -> dict[str, str]:
    too_large = UploadTooLargeError("This form is larger than any key.", "Send the key alone.")
    body = await read_whole(request.stream(), MAX_FORM_BYTES, too_large)  # before anybody is asked who they are
    return {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _own(path: str) -> str:
    """Where to go on, if that is a place of this service; a browser reads a backslash as a slash."""
    parts = urlsplit(path.replace("\\", "/"))
    inside = not parts.scheme and not parts.netloc and path.startswith("/") and not path.startswith(("//", "/\\"))
    return path if inside and path.isprintable() else "/"


def _is_https(request: Request) -> bool:
    """How the browser reached the page; a proxy may have taken the TLS off, but the form's origin still names it."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
