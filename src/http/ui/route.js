// What is shown is in the address, after the #: `#/history?m=bank/credit/1.4.0&table=custom`. So it can be shared, and
// back and forward work. A model is `space/name/version`, each part percent-encoded, so that a / in a name survives.

/** The view and its parameters (a URLSearchParams). */
export function read() {
	const [path, query = ''] = location.hash.replace(/^#\/?/, '').split(/\?(.*)/s);
	return { view: path === 'history' ? 'history' : 'state', params: new URLSearchParams(query) };
}

const encode = (text) => encodeURIComponent(text).replace(/%2F/g, '/').replace(/%3A/g, ':');

/** The address of a view; pairs without a value are left out. */
export function href(view, pairs) {
	const query = pairs.filter(([, value]) => value !== null).map(([key, value]) => `${key}=${encode(value)}`);
	return `#/${view}${query.length ? `?${query.join('&')}` : ''}`;
}

/** The key of a model, which names it in the address. */
export const keyOf = ({ space, name, version }) => [space, name, version].map(encodeURIComponent).join('/');

/** The model of a key; null, if it is none. */
export function modelOf(key) {
	try {
		const parts = key.split('/').map(decodeURIComponent);
		const [space, name, version] = parts;
		return parts.length === 3 ? { space, name, version, key: keyOf({ space, name, version }) } : null;
	} catch {
		return null;
	}
}
