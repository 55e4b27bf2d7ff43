"""What the server takes on, in one place; docs/serving.md has the status code of each."""

# one request
MAX_HEADERS = 16 * 2**10  # bytes of address and headers
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 25_000_000
MAX_PROPORTIONS = 10  # longer side to shorter: a sliding window's memory grows with it
MAX_SCANS = 100  # of a JPEG; each one of thousands of empty scans costs a pass over all pixels

# all photos together
MAX_BODIES = 8 * MAX_BYTES  # bytes of all bodies being read or waiting
PHOTOS = 4  # decoded at once: one is predicted, the others come from decoding or go to encoding
QUEUE = 32  # waiting for one of these places
CONNECTIONS = 256

# seconds
READ_SECONDS = 20.0  # for a body to come
CONNECTION_SECONDS = 30.0  # for a whole request to come, and for a response to be taken
QUEUE_SECONDS = 30.0  # for a place to become free
WORK_SECONDS = 60.0  # from there to the mask
POLL_SECONDS = 3.0  # between two looks at the champion
RETRY_SECONDS = 60.0  # until a version that could not be loaded is tried again
