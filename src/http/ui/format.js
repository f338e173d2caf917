// Numbers, sizes and times as people read them. All times are UTC.

const NUMBER = new Intl.NumberFormat('en');
const NONE = '–';
const isNone = (value) => value === null || value === undefined || Number.isNaN(value);

export const count = (value) => (isNone(value) ? NONE : NUMBER.format(value));

/** So many of something: `1 file`, `2 files`. */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? '' : 's'}`;

export function bytes(value) {
	if (isNone(value)) return NONE;
	const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
	let [size, unit] = [value, 0];
	while (size >= 1024 && unit < 5) [size, unit] = [size / 1024, unit + 1];
	return `${Number(size.toPrecision(3))} ${units[unit]}`;
}

/** A value of a metric: five digits that matter. */
export function value(found) {
	if (isNone(found) || !Number.isFinite(found)) return NONE;
	const size = Math.abs(found);
	if (size !== 0 && (size < 1e-4 || size >= 1e9)) return found.toExponential(3);
	return size >= 1e5 ? NUMBER.format(Math.round(found)) : String(Number(found.toPrecision(5)));
}

export function percent(share) {
	if (isNone(share)) return NONE;
	return `${(share * 100).toFixed(share !== 0 && share < 0.001 ? 3 : 1)} %`;
}

/** A length of time: `4.2 s`, `12 min`, `3 h 5 min`, `2 d`. */
export function duration(seconds) {
	if (isNone(seconds)) return NONE;
	if (seconds < 60) return `${seconds < 10 ? Number(seconds.toFixed(1)) : Math.round(seconds)} s`;
	const minutes = Math.round(seconds / 60);
	if (minutes < 60) return `${minutes} min`;
	const hours = Math.floor(minutes / 60);
	if (hours >= 48) return `${Math.round(hours / 24)} d`;
	return minutes % 60 && hours < 10 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
}

/** The length of bins, as the API takes it: `30s`, `15m`, `6h`, `7d`. */
export function binName(seconds) {
	const units = [['d', 86400], ['h', 3600], ['m', 60], ['s', 1]];
	const [unit, length] = units.find(([, size]) => seconds >= size && seconds % size === 0) ?? ['s', 1];
	return `${seconds / length}${unit}`;
}

const iso = (at) => new Date(at * 1000).toISOString();

/** `2026-11-28` */
export const day = (at) => iso(at).slice(0, -14);

/** `2026-11-28 09:03`, with seconds where they say something. */
export const time = (at, withSeconds = Math.floor(at) % 60 !== 0) =>
	isNone(at) ? NONE : iso(at).slice(0, withSeconds ? -5 : -8).replace('T', ' ');

/** RFC 3339 without parts of seconds. */
export const rfc3339 = (at) => `${iso(at).slice(0, -5)}Z`;

/** Seconds since 1970 of a time of the API; null of none. */
export function seconds(text) {
	const found = Date.parse(text ?? '') / 1000;
	return Number.isNaN(found) ? null : found;
}

/** `12 s ago`; of a time to come `in 3 d`. */
export function ago(at, now) {
	if (isNone(at)) return NONE;
	const passed = Math.round(now - at);
	if (passed === 0) return 'now';
	return passed < 0 ? `in ${duration(-passed)}` : `${duration(passed)} ago`;
}
