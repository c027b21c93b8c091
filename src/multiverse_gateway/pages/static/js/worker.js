// The shared worker of all tabs; the browser ends it with the last one.
import { Hub } from "./hub.js";

const hub = new Hub();
self.onconnect = ({ ports: [port] }) => hub.add(port);
