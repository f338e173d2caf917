// Finds models: a field to type in, and below it the list of what matches. Knows how models are searched and named.

import { button, clean, h, icon, name, swatch } from './dom.js';
import * as format from './format.js';
import * as route from './route.js';

const MOST_OPTIONS = 200; // Typing narrows them.

/** One model of each space, name and version, of entities of one kind each; `kinds` says since when there is one. */
export function modelsOf(entities) {
	const found = new Map();
	for (const { kind, first, last, rows, ...names } of entities) {
		const key = route.keyOf(names);
		const text = `${names.space}/${names.name}/${names.version}`.toLowerCase();
		if (!found.has(key)) found.set(key, { ...names, key, text, kinds: {}, rows: 0, last: null });
		const model = found.get(key);
		model.kinds[kind] = format.seconds(first);
		model.rows += rows ?? 0;
		model.last = Math.max(model.last, format.seconds(last)) || null;
	}
	return [...found.values()];
}

/** Space, name and version, each apart from the text around it. */
export const label = (model) =>
	h('span', h('span.muted', name(model.space), '/'), h('b', name(model.name)), h('span.tag', name(model.version)));

export const labelText = (model) => [model.space, model.name, model.version].map((part) => clean(part) || 'empty').join('/');

/**
 * The field. `models()` are all that there are, `chosen()` the keys that are shown; `toggle(key)` is called for one
 * that was chosen or given back.
 */
export function picker({ models, chosen, toggle, now }) {
	const input = h('input', {
		type: 'text',
		id: 'model-search',
		role: 'combobox',
		autocomplete: 'off',
		spellcheck: 'false',
		placeholder: 'Add a model: a part of its space, name or version',
		'aria-label': 'Search models',
		'aria-expanded': 'false',
		'aria-controls': 'model-options',
		'aria-autocomplete': 'list',
		test: 'model-search',
	});
	const list = h('ul', { id: 'model-options', role: 'listbox', 'aria-label': 'Models', 'aria-multiselectable': 'true' });
	const note = h('p.muted');
	const popup = h('div.popup', { hidden: true }, list, note);
	const element = h('div.picker', icon('search'), input, popup);
	let options = [];
	let active = -1;

	const optionOf = (model, index) =>
		h(
			'li',
			{
				id: `model-option-${index}`,
				role: 'option',
				'aria-selected': String(chosen().includes(model.key)),
				'aria-label': `${labelText(model)}, ${format.plural(model.rows, 'row')}`,
				test: 'model-option',
				data: { model: model.key },
			},
			h('span.tick'),
			h('span', h('b', name(model.name)), h('span.tag', name(model.version))),
			h('span.kinds.small', Object.keys(model.kinds).map((kind) => h('span.tag', kind))),
			h('span.muted', format.plural(model.rows, 'row')),
			h('span.muted.last', { title: `last row ${format.time(model.last, true)} UTC` }, format.ago(model.last, now())),
		);

	function draw() {
		const words = input.value.toLowerCase().split(/[\s/]+/).filter(Boolean);
		const all = models();
		const found = all.filter(({ text }) => words.every((word) => text.includes(word)));
		const shown = found.slice(0, MOST_OPTIONS);
		options = shown.map(optionOf);
		list.replaceChildren(
			...shown.flatMap((model, index) => [
				...(model.space === shown[index - 1]?.space ? [] : [h('li.group.muted', { role: 'presentation' }, name(model.space))]),
				options[index],
			]),
		);
		const sum = format.plural(all.length, 'model');
		const more = found.length - shown.length;
		note.textContent = more > 0 ? `${format.count(more)} more of ${sum}: type to narrow.` : `${format.count(found.length)} of ${sum}.`;
		move(Math.min(active, options.length - 1));
	}

	function move(next) {
		options[active]?.classList.remove('active');
		active = next;
		const option = options[active];
		option?.classList.add('active');
		input.setAttribute('aria-activedescendant', option?.id ?? '');
		option?.scrollIntoView({ block: 'nearest' });
	}

	function show(isShown) {
		if (popup.hidden === !isShown) return;
		popup.hidden = !isShown;
		input.setAttribute('aria-expanded', String(isShown));
		active = -1;
		if (isShown) draw();
		else input.value = '';
	}

	function choose(option) {
		const isFirst = chosen().length === 0;
		toggle(option.dataset.model);
		if (isFirst) show(false); // To choose more, it stays.
	}

	input.addEventListener('focus', () => show(true));
	input.addEventListener('click', () => show(true));
	input.addEventListener('input', () => {
		show(true);
		active = 0;
		draw();
		popup.scrollTop = 0;
	});
	input.addEventListener('keydown', (event) => {
		const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
		if (event.key === 'Tab' || event.key === 'Escape') show(false);
		if (event.key in steps) {
			event.preventDefault();
			show(true);
			move(Math.min(Math.max(active + steps[event.key], 0), options.length - 1));
		} else if (event.key === 'Enter' && options[active]) choose(options[active]);
	});
	popup.addEventListener('mousedown', (event) => event.preventDefault()); // The field keeps the focus.
	list.addEventListener('click', (event) => {
		const option = event.target.closest('[role=option]');
		if (option) choose(option);
	});
	const outside = (event) => element.contains(event.target) || show(false);
	document.addEventListener('pointerdown', outside);
	return {
		element,
		input,
		/** What is chosen, or the models, have changed. */
		refresh: () => popup.hidden || draw(),
		destroy: () => document.removeEventListener('pointerdown', outside),
	};
}

/** What is shown: a chip for each model, with the sample of its line. */
export const chip = (model, n, remove) =>
	h(
		'span.chip',
		{ test: 'chip', data: { model: model.key } },
		swatch(n),
		label(model),
		button(icon('close'), remove, 'chip-remove', { class: 'icon-button', title: 'Remove', 'aria-label': `Remove ${labelText(model)}` }),
	);
