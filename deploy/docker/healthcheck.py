"""Exits 0 if the service of this container answers /healthz with 200. The standard library only: it runs every few seconds.

The port is the one of SHARDLANE_METRICS_BIND, so set that variable rather than the flag.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4.0  # less than the HEALTHCHECK's own, so that a reason is printed


def main() -> int:
    bind = os.environ.get("SHARDLANE_METRICS_BIND", "0.0.0.0:9100")
    port = bind.rpartition(":")[2]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/healthz", headers={"Connection": "close"})
        response = connection.getresponse()
        response.read()  # a connection closed with bytes unread is reset, which the service would see as an error
        status = response.status
    except (OSError, http.client.HTTPException) as error:
        print(f"/healthz on port {port} does not answer: {error}")
        return 1
    finally:
        connection.close()
    print(f"/healthz on port {port}: {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
