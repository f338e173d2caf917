// Elements and texts. Names of models and metrics are the text of strangers: it gets into the page as text nodes only,
// and characters that would hide or reorder other text are spelled out.

const HIDDEN =
	/[\0-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

/** A text for display: control, bidi and invisible characters as `\u{202e}`. */
export const clean = (text) =>
	String(text ?? '').replace(HIDDEN, (found) => `\\u{${found.codePointAt(0).toString(16)}}`);

/** A name of others, apart from the direction of the text around it. */
export const name = (text) => (clean(text) ? h('bdi', clean(text)) : h('i.muted', 'empty'));

/** An element `tag.class`. Of the properties, which may be left out, `on*` are listeners, `data` and `test` its data-*. */
export function h(spec, props, ...children) {
	const [tag, ...classes] = spec.split('.');
	const made = document.createElement(tag);
	if (classes.length) made.className = classes.join(' ');
	const hasProps = props && Object.getPrototypeOf(props) === Object.prototype;
	for (const [key, value] of Object.entries(hasProps ? props : {})) {
		if (value === undefined || value === null || value === false) continue;
		if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
		else if (key === 'data') Object.assign(made.dataset, value);
		else if (key === 'test') made.dataset.test = value;
		else made.setAttribute(key, value === true ? '' : value);
	}
	const content = hasProps ? children : [props, ...children];
	made.append(...content.flat(Infinity).filter((child) => child || child === 0));
	return made;
}

export const button = (content, onclick, test, props) =>
	h('button', { type: 'button', onclick, test, ...props }, content);

/** Buttons of [id, text], of which one is pressed: `press(id)`. */
export function segments(label, choices, test, choose) {
	const element = h('div.segments', { role: 'group', 'aria-label': label });
	let drawn;
	const set = (now) => {
		if (drawn === String(now)) return; // What has the focus keeps it.
		drawn = String(now);
		element.replaceChildren(...now.map(([id, text]) => button(text, () => choose(id), test, { data: { [test]: id } })));
	};
	const press = (id) => {
		for (const one of element.children) one.setAttribute('aria-pressed', String(one.dataset[test] === id));
	};
	set(choices);
	return { element, set, press };
}

/** Replaces what is in a place, if it says something else: what is selected, or was read aloud, is left alone. */
export function replace(place, ...content) {
	const made = h('div', content);
	if (made.textContent !== place.textContent) place.replaceChildren(...made.childNodes);
}

function svg(kind, box, d) {
	const [made, path] = ['svg', 'path'].map((tag) => document.createElementNS('http://www.w3.org/2000/svg', tag));
	path.setAttribute('d', d);
	made.setAttribute('viewBox', box);
	made.setAttribute('class', kind);
	made.setAttribute('aria-hidden', 'true');
	made.append(path);
	return made;
}

const CIRCLE = 'M12 3a9 9 0 1 0 0 18a9 9 0 0 0 0-18';
const ICONS = {
	ok: `${CIRCLE}M8 12.5l2.8 2.7L16 9.5`,
	warning: 'M12 4L2.8 20h18.4zM12 10v4.5M12 17.4v.1',
	error: 'M8 3h8l5 5v8l-5 5H8l-5-5V8zM12 8v5M12 16.2v.1',
	sun: 'M12 8a4 4 0 1 0 0 8a4 4 0 0 0 0-8M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4',
	moon: 'M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z',
	download: 'M12 4v11M7.5 11l4.5 4.5l4.5-4.5M4.5 20h15',
	search: 'M10.5 4a6.5 6.5 0 1 0 0 13a6.5 6.5 0 0 0 0-13M15.5 15.5l5 5',
	close: 'M6 6l12 12M18 6L6 18',
};

/** An icon for the eye only: what it means must also be said in text. */
export const icon = (kind) => svg(`icon ${kind}`, '0 0 24 24', ICONS[kind]);

/** Of the lines of models: so many can be told apart. */
export const DASHES = [[], [9, 4], [2, 3], [12, 3, 2, 3], [6, 2], [16, 4]];

/** A sample of the line of the n-th model. */
export function swatch(n) {
	const made = svg('swatch', '0 0 26 10', 'M1 5h24');
	Object.assign(made.style, { stroke: `var(--s${n})`, strokeDasharray: DASHES[n].join(' ') });
	return made;
}

export function colorBox(color) {
	const made = h('span.box');
	made.style.background = color;
	return made;
}

export const color = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();

export const announce = (text) => replace(document.getElementById('announce'), text);

/** Whether the view has what it asked for. */
export function setReady(isReady) {
	document.documentElement.dataset.ready = String(isReady);
}

/** What went wrong, and a way to try again. */
export const errorBox = ({ status, title, detail, message }, retry) =>
	h(
		'div.notice',
		{ role: 'alert', test: 'error' },
		icon('error'),
		h('div', h('b', clean(`${status || ''} ${title ?? 'Error'}`)), h('p', clean(detail ?? message))),
		button('Retry', retry, 'retry'),
	);

/** Work in progress, seen after 200 ms. */
export const spinner = (text, cancel) =>
	h('div.spinner', { role: 'status', test: 'spinner' }, h('span.wheel'), text, cancel && button('Cancel', cancel, 'cancel'));
