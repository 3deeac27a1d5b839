"""Routers: each names the bucket that a request needs. ONE FILE = ONE ROUTER."""

from __future__ import annotations

import importlib

from edgecomp.routers._base import Router, RouterSite, StemScore
from edgecomp.specs.router import router_names

__all__ = ["Router", "RouterSite", "StemScore", "router_class"]


def router_class(name: str) -> type[Router]:
    """Return the class of a router that is a graph; its file bears its name."""
    assert name in router_names(), name
    module = importlib.import_module(f"edgecomp.routers.{name}")
    cls: type[Router] = getattr(module, f"{name.title()}Router")
    return cls
