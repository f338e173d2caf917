// Asks the API, which is beside this folder wherever that may be mounted. Knows: so many requests at a time, to wait
// when the server says that it is busy (429), and that an error is a problem of RFC 9457.

const BASE = new URL('../api/', import.meta.url);
const AT_ONCE = 4;
const ATTEMPTS = 4; // If the server is too busy.

/** An answer that is none. */
class Problem extends Error {
	constructor(status, title, detail) {
		super(detail);
		Object.assign(this, { status, title, detail });
	}
}

let running = 0;
const waiting = [];

async function enter(signal) {
	if (running >= AT_ONCE) await new Promise((go) => waiting.push(go));
	else running += 1;
	if (signal?.aborted) exit();
	signal?.throwIfAborted();
}

function exit() {
	const next = waiting.shift();
	if (next) next(); // It takes over the place.
	else running -= 1;
}

async function problemOf(response) {
	const { title, detail } = await response.json().catch(() => ({}));
	return new Problem(response.status, title ?? response.statusText, detail ?? 'The answer has no details.');
}

/** The JSON at a path of the API; `query` are pairs. */
export async function get(path, query = [], signal = undefined) {
	const url = new URL(path, BASE);
	url.search = new URLSearchParams(query);
	for (let attempt = 1; ; attempt += 1) {
		await enter(signal);
		let wait;
		try {
			const response = await fetch(url, { signal, headers: { accept: 'application/json' } });
			if (response.ok) return await response.json();
			if (response.status !== 429 || attempt === ATTEMPTS) throw await problemOf(response);
			wait = Math.min(Number(response.headers.get('retry-after')) || 1, 30);
		} catch (error) {
			if (error instanceof Problem || signal?.aborted) throw error;
			throw new Problem(0, 'No answer', 'Highwater cannot be reached, or what it answers is not JSON.');
		} finally {
			exit();
		}
		await new Promise((go) => setTimeout(go, wait * 1000));
	}
}
