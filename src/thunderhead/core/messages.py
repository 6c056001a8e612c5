"""Messages to users name the setting that they are about by its full path, which the one who refuses may not know."""

import re


def at(path: str, message: str) -> str:
    """Complete a message about what lies at a config path: `max_bytes=5 is …` names a setting of it, others do not."""
    if re.match(rf"{re.escape(path)}[.:= ]", message):
        return message
    return f"{path}.{message}" if re.match(r"[A-Za-z_]\w*=", message) else f"{path}: {message}"
