// Light or dark, before anything is drawn: a classic script in the head, so that a dark page does not flash white.
// Knows what the reader chose (localStorage), and else what the system prefers.
(() => {
	const { dataset } = document.documentElement;
	const system = matchMedia('(prefers-color-scheme: dark)');
	const preferred = () => (system.matches ? 'dark' : 'light');
	let chosen = null;
	function apply() {
		dataset.theme = chosen ?? preferred();
		document.dispatchEvent(new Event('theme'));
	}
	globalThis.toggleTheme = () => {
		const next = dataset.theme === 'dark' ? 'light' : 'dark';
		chosen = next === preferred() ? null : next; // What the system prefers anyway is followed.
		try {
			localStorage.setItem('highwater-theme', chosen ?? '');
		} catch {} // Without storage it lasts as long as the page.
		apply();
	};
	try {
		chosen = ['dark', 'light'].find((theme) => theme === localStorage.getItem('highwater-theme')) ?? null;
	} catch {}
	system.addEventListener('change', apply);
	apply();
})();
