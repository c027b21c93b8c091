// The network is gone: the page shows the last known state.
export const show = (id, shown) => {
  const banner = document.getElementById(id);
  if (banner.hidden === shown) banner.hidden = !shown;
};
export const offline = () => show("offline", true);
export const online = () => show("offline", false);
