"""What a client is told when its request is refused; each wire writes it in its own form."""


class Refused(Exception):
    """A request that is not served: an HTTP `status`, a short `code` a program can read, and a `message` for a person."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
