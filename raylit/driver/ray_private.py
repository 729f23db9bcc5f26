"""The private names of Ray that raylit cannot do without, each behind one function. Driver."""

from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]


def reload_authentication() -> None:
    """Have this process follow RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are now: Ray reads them once, on import."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
