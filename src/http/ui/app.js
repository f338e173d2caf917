// The frame of the page: the header, which view is shown, and the state of the process, which the views share. Asks for
// the state every 5 s in the state view, else every 30 s, and not while nobody looks.

import { get } from './api.js';
import { h, icon, replace } from './dom.js';
import * as history from './history.js';
import * as route from './route.js';
import * as state from './state.js';

const VIEWS = { state, history };
const main = document.getElementById('main');

/** What the views get from here: the last state, why there is no newer one, and the time by the clock of the server. */
const shared = { state: null, error: null, now: () => Date.now() / 1000 + skew, poll };
let skew = 0;
let lastHistory = '#/history';
let shown = null;
let timer;
let isAsking = false;

async function poll() {
	if (isAsking) return;
	isAsking = true;
	clearTimeout(timer);
	try {
		shared.state = await get('state');
		shared.error = null;
		const apart = shared.state.now - Date.now() / 1000;
		skew = Math.abs(apart) < 2 ? 0 : apart;
	} catch (error) {
		shared.error = error;
	}
	isAsking = false;
	header();
	shown.mounted.onState();
	if (!document.hidden) timer = setTimeout(poll, shown.view === 'state' ? 5000 : 30000);
}

function header() {
	const place = document.getElementById('process');
	const { state: known, error } = shared;
	const mode = `${known?.archives ? 'archiving' : 'read only'}${known?.is_ready ? '' : ', not ready'}`;
	place.dataset.level = error ? 'error' : known.is_ready ? 'ok' : 'warning';
	replace(place, h('span.dot'), h('span', error ? 'no answer' : mode), known && h('span.version.muted', `v${known.version}`));
}

function show() {
	const { view, params } = route.read();
	if (view === 'history') lastHistory = location.hash;
	for (const link of document.querySelectorAll('nav a')) {
		const isHere = link.dataset.view === view;
		if (isHere) link.setAttribute('aria-current', 'page');
		else link.removeAttribute('aria-current');
		if (link.dataset.view === 'history') link.href = isHere ? '#/history' : lastHistory;
	}
	if (shown?.view !== view) {
		const hadFocus = main.contains(document.activeElement);
		shown?.mounted.unmount();
		main.replaceChildren();
		scrollTo(0, 0);
		shown = { view, mounted: VIEWS[view].mount(main, shared) };
		if (hadFocus) main.focus({ preventScroll: true });
		poll();
	}
	shown.mounted.update(params);
}

const theme = document.getElementById('theme');
function drawTheme() {
	const isDark = document.documentElement.dataset.theme === 'dark';
	theme.replaceChildren(icon(isDark ? 'sun' : 'moon'));
	theme.title = isDark ? 'Light colours' : 'Dark colours';
	theme.setAttribute('aria-label', theme.title);
	shown?.mounted.onTheme();
}
theme.addEventListener('click', () => globalThis.toggleTheme());
document.addEventListener('theme', drawTheme);
drawTheme();

document.getElementById('skip').addEventListener('click', () => main.focus());
document.addEventListener('visibilitychange', () => (document.hidden ? clearTimeout(timer) : poll()));
addEventListener('hashchange', show);
show();
